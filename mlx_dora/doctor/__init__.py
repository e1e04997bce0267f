"""What ``mlx_dora.doctor`` finds out about the machine it runs on."""
