"""Extensions of Sphinx: reference pages made from what the code declares."""
