"""What a person types: a module for each command; the only code that prints."""
