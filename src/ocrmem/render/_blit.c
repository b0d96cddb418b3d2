/* Breaks text into lines, as render/layout.py does, and writes a page: background, and the glyphs of its lines, as
   render/raster.py does with numpy alone.

   The extension is optional: where no compiler is at hand it is not built, and the pages are the same, byte for byte. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define NUM_BUFFERS 9
#define SPILL 8 /* bytes copied at once; what goes beyond a glyph is overwritten by the next, or by the background after the last */

static int check(const Py_buffer *buffer, Py_ssize_t size, const char *name)
{
    if (buffer->len < size) {
        PyErr_Format(PyExc_ValueError, "%s holds %zd bytes, expected at least %zd", name, buffer->len, size);
        return -1;
    }
    return 0;
}

static int draw_lines(Py_buffer *buffers, Py_ssize_t page_width, Py_ssize_t height, Py_ssize_t left, Py_ssize_t right,
                      int background)
{
    uint8_t *image = buffers[0].buf;
    int32_t *boxes = buffers[1].buf;
    const int64_t *stops = buffers[2].buf, *begins = buffers[3].buf, *tops = buffers[4].buf;
    const int64_t *ids = buffers[5].buf, *widths = buffers[6].buf, *glyphs = buffers[7].buf;
    const uint8_t *pixels = buffers[8].buf;
    Py_ssize_t num_lines = buffers[2].len / 8, num_glyphs = buffers[5].len / 8, known = buffers[7].len / 16;
    Py_ssize_t page_height = page_width > 0 ? buffers[0].len / page_width : 0, glyph = 0, filled = 0;

    if (left < 0 || right > page_width || height < 1 || check(&buffers[1], 16 * num_glyphs, "boxes") ||
        check(&buffers[3], 8 * num_lines, "begins") || check(&buffers[4], 8 * num_lines, "tops") ||
        check(&buffers[6], 8 * num_glyphs, "widths"))
        return -1;
    for (Py_ssize_t line = 0; line < num_lines; line++) {
        Py_ssize_t x = left + begins[line], top = tops[line];
        if (stops[line] > num_glyphs || top < filled || top + height > page_height || x < left || x > page_width)
            return -1;
        memset(image + filled * page_width, background, (top - filled) * page_width);
        for (Py_ssize_t y = 0; y < height; y++)
            memset(image + (top + y) * page_width, background, x);
        filled = top + height;
        for (; glyph < stops[line]; glyph++) {
            Py_ssize_t width = widths[glyph], end;
            if (ids[glyph] < 0 || ids[glyph] >= known || width < 0)
                return -1;
            /* where the glyph's pixels begin, row by row, and how wide each row is */
            const uint8_t *from = pixels + glyphs[2 * ids[glyph]];
            Py_ssize_t pitch = glyphs[2 * ids[glyph] + 1];
            if (width > right - x)
                width = right > x ? right - x : 0; /* spaces that hang over the margin are cut there */
            if (width > pitch)
                return -1;
            end = x + width;
            boxes[glyph] = (int32_t)x;
            boxes[num_glyphs + glyph] = (int32_t)top;
            boxes[2 * num_glyphs + glyph] = (int32_t)end;
            boxes[3 * num_glyphs + glyph] = (int32_t)(top + height);
            if (width > 0) {
                uint8_t *to = image + top * page_width + x;
                if (width <= SPILL && x + SPILL <= page_width)
                    for (Py_ssize_t y = 0; y < height; y++)
                        memcpy(to + y * page_width, from + y * pitch, SPILL);
                else if (width <= 2 * SPILL && x + 2 * SPILL <= page_width)
                    for (Py_ssize_t y = 0; y < height; y++)
                        memcpy(to + y * page_width, from + y * pitch, 2 * SPILL);
                else
                    for (Py_ssize_t y = 0; y < height; y++)
                        memcpy(to + y * page_width, from + y * pitch, width);
            }
            x = end;
        }
        for (Py_ssize_t y = 0; y < height; y++)
            memset(image + (top + y) * page_width + x, background, page_width - x);
    }
    memset(image + filled * page_width, background, (page_height - filled) * page_width);
    return 0;
}

static PyObject *draw(PyObject *module, PyObject *arguments)
{
    Py_buffer buffers[NUM_BUFFERS];
    Py_ssize_t page_width, height, left, right;
    int background, failed;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "w*w*y*y*y*y*y*y*y*nnnni", &buffers[0], &buffers[1], &buffers[2], &buffers[3],
                          &buffers[4], &buffers[5], &buffers[6], &buffers[7], &buffers[8], &page_width, &height, &left,
                          &right, &background))
        return NULL;
    failed = draw_lines(buffers, page_width, height, left, right, background);
    for (int i = 0; i < NUM_BUFFERS; i++)
        PyBuffer_Release(&buffers[i]);
    if (failed) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a line or a glyph does not fit the page");
        return NULL;
    }
    Py_RETURN_NONE;
}

enum { ENDS, BREAKS, KNOWN, SPACES, HARD, FOUND, NUM_ARRAYS };

/* Break a block into lines until one needs what only Python knows: a tab, or a break that Annex 14 has to be asked about.
   Four numbers a line go to `found`: its first glyph, one past its last, and whether it starts and ends a paragraph.
   Returns the number of lines. */
static Py_ssize_t find_lines(Py_buffer *arrays, Py_ssize_t next_tab, int64_t width, int64_t indent, int keep, int annex,
                             Py_ssize_t *first, int *opens)
{
    const int64_t *ends = arrays[ENDS].buf, *breaks = arrays[BREAKS].buf;
    const uint8_t *known = arrays[KNOWN].buf, *spaces = arrays[SPACES].buf, *hard = arrays[HARD].buf;
    int64_t *found = arrays[FOUND].buf;
    Py_ssize_t count = arrays[ENDS].len / 8, num_breaks = arrays[BREAKS].len / 8, room = arrays[FOUND].len / 32;
    Py_ssize_t lines = 0, place = 0, beyond = num_breaks; /* breaks before `place` are at `stop` or before it */

    while (place < beyond) { /* those at the first glyph or before it */
        Py_ssize_t middle = (place + beyond) / 2;
        if (breaks[middle] <= *first)
            place = middle + 1;
        else
            beyond = middle;
    }
    while (*first < count && lines < room) {
        int64_t limit = (*first ? ends[*first - 1] : 0) + width - (*opens ? indent : 0);
        Py_ssize_t begin = *first, fits = begin, stop;
        const uint8_t *forced;
        while (fits < count && ends[fits] <= limit)
            fits++;
        if (next_tab < fits)
            break;
        stop = fits > begin ? fits : begin + 1;
        while (stop < count && spaces[stop])
            stop++; /* spaces at the end of a line hang over the margin */
        forced = keep ? memchr(hard + begin, 1, stop - begin) : NULL;
        if (forced != NULL)
            stop = forced - hard + 1;
        else if (stop < count) {
            while (place < num_breaks && breaks[place] <= stop)
                place++;
            if (place > 0 && breaks[place - 1] > begin && (!annex || known[place - 1]))
                stop = breaks[place - 1];
            else if (annex)
                break;
        }
        found[4 * lines] = begin;
        found[4 * lines + 1] = stop;
        found[4 * lines + 2] = *opens;
        *opens = keep && hard[stop - 1] == 1;
        found[4 * lines + 3] = *opens;
        *first = stop;
        lines++;
    }
    return lines;
}

static PyObject *break_lines(PyObject *module, PyObject *arguments)
{
    Py_buffer arrays[NUM_ARRAYS];
    Py_ssize_t next_tab, width, indent, first, count, lines = -1;
    int keep, annex, opens;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*y*w*nnnppnp", &arrays[ENDS], &arrays[BREAKS], &arrays[KNOWN],
                          &arrays[SPACES], &arrays[HARD], &arrays[FOUND], &next_tab, &width, &indent, &keep, &annex,
                          &first, &opens))
        return NULL;
    count = arrays[ENDS].len / 8;
    if (first < 0)
        PyErr_Format(PyExc_ValueError, "first is %zd, expected 0 or more", first);
    else if (check(&arrays[SPACES], count, "spaces") == 0 && check(&arrays[HARD], count, "hard") == 0 &&
             (!annex || check(&arrays[KNOWN], arrays[BREAKS].len / 8, "known") == 0))
        lines = find_lines(arrays, next_tab, width, indent, keep, annex, &first, &opens);
    for (int i = 0; i < NUM_ARRAYS; i++)
        PyBuffer_Release(&arrays[i]);
    if (lines < 0)
        return NULL;
    return Py_BuildValue("nnO", lines, first, opens ? Py_True : Py_False);
}

static PyMethodDef methods[] = {
    {"break_lines", break_lines, METH_VARARGS,
     "break_lines(ends, breaks, known, spaces, hard, found, next_tab, width, indent, keep, annex, first, opens) -> "
     "(number of lines, first glyph that is in none, whether it starts a paragraph)"},
    {"draw", draw, METH_VARARGS,
     "draw(image, boxes, stops, begins, tops, ids, widths, glyphs, pixels, page_width, height, left, right, background)"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_blit", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__blit(void)
{
    return PyModule_Create(&definition);
}
