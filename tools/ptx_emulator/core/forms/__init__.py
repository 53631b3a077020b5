"""What each instruction does: modules that register instructions, named after them."""
