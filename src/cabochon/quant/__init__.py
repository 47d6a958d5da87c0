"""What a stored matrix is: the schemes, and what each producer claims about them."""
