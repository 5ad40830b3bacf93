"""The mathematics: bilevel problems, update rules, hypergradient estimators and the outer loop. Needs torch alone."""
