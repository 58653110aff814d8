"""Training of the embedded model, from nothing, on two CPU cores or a GPU."""
