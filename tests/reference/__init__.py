"""Independent float64 NumPy versions, written from the papers' equations with loops and no regard for speed."""
