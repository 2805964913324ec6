"""The zoo: public architectures, built small with random weights, and checks of each. `python -m tools.zoo` runs them."""
