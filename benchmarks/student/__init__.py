"""What a student in training costs."""
