"""How an encoder runs: the arithmetic, and the launch around it. README.md here says how to add one."""
