"""Cases of students: what is trained, and what comes out."""
