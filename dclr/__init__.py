"""dclr: self-supervised video representation learning by dual contrastive learning (DCLR, ACM MM 2022)."""
