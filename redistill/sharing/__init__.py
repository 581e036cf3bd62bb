"""What an archive needs to be shared: its terms, a card that describes it, and a signature."""
