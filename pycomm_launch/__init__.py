"""What has to be known before pycomm, or torch, can be imported. It imports neither."""
