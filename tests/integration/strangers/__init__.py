"""Inputs of people who have not read the code, kind by kind."""
