"""What draft vocabularies keep of a draft, and what they cost; `modes` names them."""
