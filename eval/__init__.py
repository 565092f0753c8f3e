"""Top level: how good is a model? Losses, answers, scores and the page that shows them."""
