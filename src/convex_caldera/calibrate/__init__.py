"""Tokens to statistics, one per distinct input of the linear layers."""
