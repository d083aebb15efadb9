"""The recipe of the embedded family: renders its pictures, trains it, measures it."""
