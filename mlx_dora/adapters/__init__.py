"""A set of DoRA layers in a model or on disk: config, surgery, files, fuse."""
