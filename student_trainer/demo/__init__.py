"""The main job on a real small teacher, from text to a distilled student and a report."""
