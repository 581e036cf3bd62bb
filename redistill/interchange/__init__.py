"""Other formats: logits that another program cached become an archive, and an archive becomes files for other loops."""
