"""How each system trains and scores."""
