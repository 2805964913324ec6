"""What a pass is, and how passes run one after another, are checked and are put back."""
