"""Loading students and teachers, and what is read off them."""
