"""Many videos by many machines: a worker that holds a pipeline, and the two ways in which Ray runs several of them."""
