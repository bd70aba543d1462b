"""Models: classifiers of texts and of images, with one set of methods."""
