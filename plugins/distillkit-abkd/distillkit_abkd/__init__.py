"""The α-β divergence of ABKD as a distillkit loss."""
