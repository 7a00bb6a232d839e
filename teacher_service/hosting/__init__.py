"""The service's teachers: opened, added and removed; corpora filled by them in the background; metrics and coverage."""
