def path_tree(report, explanation): return ""
