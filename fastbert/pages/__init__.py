"""Pages of HTML and the figures in them."""
