"""Looking at what a model does: pictures of its samples, and measurements that are not scores."""
