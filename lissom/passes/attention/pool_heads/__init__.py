"""The pass `pool-heads` and how the heads of a group become one."""
