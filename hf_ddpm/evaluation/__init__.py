"""How good a model is: measured on images, by numbers with their standard errors."""
