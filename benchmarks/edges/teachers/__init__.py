"""Cases of teachers: how they are opened, and what is kept of them."""
