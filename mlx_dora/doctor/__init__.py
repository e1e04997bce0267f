"""The checks of ``mlx_dora.doctor`` on the machine it runs on."""
