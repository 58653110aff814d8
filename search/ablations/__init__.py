"""The paper's studies (Figs. 4 to 7, Table 9) over one evaluation: pure makers of variants, and what runs them."""
