"""Records of a run: a file of JSON lines, TensorBoard, and a progress display that follows them."""
