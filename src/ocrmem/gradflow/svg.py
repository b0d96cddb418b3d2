def draw_path(report, explanation): return ""
