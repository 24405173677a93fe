"""Fast adversarial training on one GPU: ARAT and the methods it is compared with."""
