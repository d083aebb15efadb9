"""The recipe of the tiny family: render its images, train it, measure it."""
