"""Neural-network modules: split batch normalisation and what goes with it."""
