"""Every kernel compiled without a GPU: registers, spills, instruction widths."""
