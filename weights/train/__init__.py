"""The recipe of the embedded family: render its images, train it, measure it."""
