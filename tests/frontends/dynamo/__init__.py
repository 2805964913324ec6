"""Tests of lissom.frontends.dynamo."""
