"""The `redistill` command: parse options, call the library, render. The only package that prints or exits."""
