"""Between the protocols and the scheduler: text in, tokens to the scheduler, text out."""
