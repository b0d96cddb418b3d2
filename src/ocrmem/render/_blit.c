/* Looks up the glyphs of a text and breaks it into lines, as render/layout.py does with numpy alone, and writes a page:
   background, and the glyphs of its lines, as render/raster.py does.

   The extension is optional: where no compiler is at hand it is not built, and the pages are the same, byte for byte.
   It allocates nothing; every array is the caller's, and its size is checked. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define INTERFACE 3 /* raised with every change of the functions' arguments, here and in render/native.py */
#define NUM_BUFFERS 9
#define NUM_CODES 0x110000
#define LATER 8 /* added to the simple class of marks that no line begins with, as in render/breaking.py */
#define TILE 16 /* pixels of a row that are copied at once, PIXELS in render/atlas.py */

static int check(const Py_buffer *buffer, Py_ssize_t size, const char *name)
{
    if (buffer->len < size) {
        PyErr_Format(PyExc_ValueError, "%s holds %zd bytes, expected at least %zd", name, buffer->len, size);
        return -1;
    }
    return 0;
}

/* Copy a tile of `height` rows to a page. */
static void copy_tile(uint8_t *to, Py_ssize_t page_width, const uint8_t *from, Py_ssize_t height)
{
    for (; height >= 4; height -= 4, to += 4 * page_width, from += 4 * TILE) {
        memcpy(to, from, TILE);
        memcpy(to + page_width, from + TILE, TILE);
        memcpy(to + 2 * page_width, from + 2 * TILE, TILE);
        memcpy(to + 3 * page_width, from + 3 * TILE, TILE);
    }
    for (; height > 0; height--, to += page_width, from += TILE)
        memcpy(to, from, TILE);
}

static int draw_lines(Py_buffer *buffers, Py_ssize_t page_width, Py_ssize_t height, Py_ssize_t left, Py_ssize_t right,
                      int background)
{
    uint8_t *image = buffers[0].buf;
    const int64_t *stops = buffers[2].buf, *begins = buffers[3].buf, *tops = buffers[4].buf, *places = buffers[7].buf;
    const int32_t *ids = buffers[5].buf, *widths = buffers[6].buf;
    const uint8_t *pixels = buffers[8].buf;
    Py_ssize_t num_lines = buffers[2].len / 8, num_glyphs = buffers[5].len / 4, known = buffers[7].len / 16;
    Py_ssize_t page_height = page_width > 0 ? buffers[0].len / page_width : 0, glyph = 0, filled = 0;
    int32_t *lefts = buffers[1].buf, *upper = lefts + num_glyphs, *rights = upper + num_glyphs;
    int32_t *lower = rights + num_glyphs;

    if (left < 0 || right < left || right > page_width || page_width > INT32_MAX || page_height > INT32_MAX ||
        height < 1 || height > page_height || check(&buffers[1], 16 * num_glyphs, "boxes") ||
        check(&buffers[3], 8 * num_lines, "begins") || check(&buffers[4], 8 * num_lines, "tops") ||
        check(&buffers[6], 4 * num_glyphs, "widths"))
        return -1;
    for (Py_ssize_t line = 0; line < num_lines; line++) {
        Py_ssize_t x = left, top = tops[line], first = glyph;
        if (stops[line] > num_glyphs || top < filled || top > page_height - height || begins[line] < 0 ||
            begins[line] > right - left)
            return -1;
        /* The line as well: it is then in the cache when its glyphs are copied to rows that lie far apart. */
        memset(image + filled * page_width, background, (top + height - filled) * page_width);
        filled = top + height;
        x += begins[line];
        for (; glyph < stops[line]; glyph++) {
            Py_ssize_t width = widths[glyph], begin, end;
            if (ids[glyph] < 0 || ids[glyph] >= known)
                return -1;
            /* The glyph's pixels: a tile of rows of 16, the next tile after it. */
            begin = places[2 * ids[glyph]];
            if (width > right - x)
                width = right - x; /* spaces that hang over the margin are cut there */
            if (width < 0 || width > places[2 * ids[glyph] + 1] || begin < 0 ||
                begin > buffers[8].len - (width + TILE - 1) / TILE * TILE * height)
                return -1;
            lefts[glyph] = (int32_t)x;
            for (end = x + width; x < end; x += TILE, begin += TILE * height) {
                uint8_t *to = image + top * page_width + x;
                /* What a tile writes beyond its glyph, the next one or the background overwrites. */
                if (x + TILE <= page_width)
                    copy_tile(to, page_width, pixels + begin, height);
                else
                    for (Py_ssize_t y = 0; y < height; y++)
                        memcpy(to + y * page_width, pixels + begin + y * TILE, end - x);
            }
            x = end;
            rights[glyph] = (int32_t)x;
        }
        for (; first < glyph; first++) {
            upper[first] = (int32_t)top;
            lower[first] = (int32_t)(top + height);
        }
        for (Py_ssize_t y = 0, spilt = page_width - x < TILE ? page_width - x : TILE; y < height; y++)
            memset(image + (top + y) * page_width + x, background, spilt);
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

enum { GLYPHS, FACTS, KNOWN_WIDTHS, IDS, WIDTHS, CLASSES, ANNEX, NUM_TABLES };

/* Glyph, width and classes of each character, by the tables of render/layout.py, until one is not `simple`.
   Returns the number of characters looked up; `marked` says whether one of them runs from right to left. */
static Py_ssize_t look_up_all(PyObject *text, Py_buffer *tables, int simple, int *marked)
{
    const int32_t *glyphs = tables[GLYPHS].buf, *known_widths = tables[KNOWN_WIDTHS].buf;
    const uint8_t *facts = tables[FACTS].buf;
    int32_t *ids = tables[IDS].buf, *widths = tables[WIDTHS].buf;
    uint8_t *classes = tables[CLASSES].buf, *annex = tables[ANNEX].buf;
    Py_ssize_t count = PyUnicode_GET_LENGTH(text), known = tables[KNOWN_WIDTHS].len / 4, place;
    int kind = PyUnicode_KIND(text);
    const void *data = PyUnicode_DATA(text);

    *marked = 0;
    for (place = 0; place < count; place++) {
        Py_UCS4 code = PyUnicode_READ(kind, data, place);
        const uint8_t *fact = facts + 4 * (size_t)code; /* kind, class, class for Annex 14, right to left */
        int32_t glyph = glyphs[code];
        if (fact[0] != simple || glyph < 0 || glyph >= known)
            break;
        ids[place] = glyph;
        widths[place] = known_widths[glyph];
        classes[place] = fact[1];
        annex[place] = fact[2];
        *marked |= fact[3];
    }
    return place;
}

static PyObject *look_up(PyObject *module, PyObject *arguments)
{
    Py_buffer tables[NUM_TABLES];
    PyObject *text;
    Py_ssize_t count, found = -1;
    int simple, marked = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Uy*y*y*w*w*w*w*i", &text, &tables[GLYPHS], &tables[FACTS], &tables[KNOWN_WIDTHS],
                          &tables[IDS], &tables[WIDTHS], &tables[CLASSES], &tables[ANNEX], &simple))
        return NULL;
    if (PyUnicode_READY(text) < 0) /* nothing to do since Python 3.12 */
        goto done;
    count = PyUnicode_GET_LENGTH(text);
    if (check(&tables[GLYPHS], 4 * NUM_CODES, "glyphs") == 0 && check(&tables[FACTS], 4 * NUM_CODES, "facts") == 0 &&
        check(&tables[IDS], 4 * count, "ids") == 0 && check(&tables[WIDTHS], 4 * count, "widths") == 0 &&
        check(&tables[CLASSES], count, "classes") == 0 && check(&tables[ANNEX], count, "annex") == 0)
        found = look_up_all(text, tables, simple, &marked);
done:
    for (int i = 0; i < NUM_TABLES; i++)
        PyBuffer_Release(&tables[i]);
    return found < 0 ? NULL : Py_BuildValue("nO", found, marked ? Py_True : Py_False);
}

enum { LINE_WIDTHS, LINE_IDS, LINE_CLASSES, PAIRS, TABLE, ROWS, NUM_ARRAYS };
enum { HOLDS, ASK, KNOWN, SPACED }; /* decisions, as in render/breaking.py; those from SPACED on have rows of flags */

/* Whether a line may begin before the glyph `place`: HOLDS, ASK or KNOWN. */
static int decide(const uint8_t *pairs, const uint8_t *table, Py_ssize_t place)
{
    int decision = table[(pairs[place - 1] << 4 | pairs[place]) & 255];
    if (decision < SPACED)
        return decision;
    return place > 1 && table[256 + 16 * (decision > SPACED) + (pairs[place - 2] & 15)] ? KNOWN : ASK;
}

typedef struct {
    Py_ssize_t first; /* the first glyph that is in no line yet */
    int opens;        /* whether it starts a paragraph */
    Py_ssize_t base;  /* where only Python can go on: the last known place for a break, or `first` */
    Py_ssize_t stop;  /* the last place that fits; `first` where a tab comes before it */
    int asks;         /* whether places after `base` are open */
} State;

/* Break a block into lines until one needs what only Python knows: a tab, or a break that Annex 14 has to be asked about.
   Four numbers a line go to `rows`: its first glyph, one past its last, and whether it starts and ends a paragraph.
   Returns the number of lines. */
static Py_ssize_t find_lines(Py_buffer *arrays, int tab, int64_t width, int64_t indent, int keep, int annex, int space,
                             int hard, State *state)
{
    const int32_t *widths = arrays[LINE_WIDTHS].buf, *ids = arrays[LINE_IDS].buf;
    const uint8_t *classes = arrays[LINE_CLASSES].buf, *pairs = arrays[PAIRS].buf, *table = arrays[TABLE].buf;
    int64_t *rows = arrays[ROWS].buf;
    Py_ssize_t count = arrays[LINE_CLASSES].len, room = arrays[ROWS].len / 32, lines = 0, first = state->first;

    while (first < count && lines < room) {
        int64_t rest = width - (state->opens ? indent : 0);
        Py_ssize_t fits = first, stop, place;
        const uint8_t *forced;
        int decision = HOLDS;

        state->first = state->base = state->stop = first;
        state->asks = 0;
        for (; fits < count && widths[fits] <= rest; fits++) {
            if (ids[fits] == tab)
                return lines;
            rest -= widths[fits];
        }
        stop = fits > first ? fits : first + 1;
        while (stop < count && classes[stop] == space)
            stop++; /* spaces at the end of a line hang over the margin */
        forced = keep ? memchr(classes + first, hard, stop - first) : NULL;
        if (forced != NULL)
            stop = forced - classes + 1;
        else if (stop < count) {
            for (place = stop; place > first && decision != KNOWN; place--) {
                decision = decide(pairs, table, place);
                state->asks |= decision == ASK;
            }
            if (decision == KNOWN)
                state->base = place + 1;
            if (decision == KNOWN && !state->asks)
                stop = state->base;
            else if (annex) {
                state->stop = stop;
                return lines;
            } else {
                for (place = stop; place > first && pairs[place] & LATER; place--)
                    ;
                stop = place > first ? place : stop; /* a long word is cut, but not before a mark */
            }
        }
        rows[4 * lines] = first;
        rows[4 * lines + 1] = stop;
        rows[4 * lines + 2] = state->opens;
        state->opens = keep && classes[stop - 1] == hard;
        rows[4 * lines + 3] = state->opens;
        first = stop;
        lines++;
    }
    state->first = first;
    return lines;
}

static PyObject *break_lines(PyObject *module, PyObject *arguments)
{
    Py_buffer arrays[NUM_ARRAYS];
    Py_ssize_t width, indent, count, lines = -1;
    int tab, keep, annex, space, hard;
    State state = {0, 0, 0, 0, 0};
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*y*w*innppiinp", &arrays[LINE_WIDTHS], &arrays[LINE_IDS],
                          &arrays[LINE_CLASSES], &arrays[PAIRS], &arrays[TABLE], &arrays[ROWS], &tab, &width, &indent,
                          &keep, &annex, &space, &hard, &state.first, &state.opens))
        return NULL;
    count = arrays[LINE_CLASSES].len;
    if (state.first < 0 || width < 0 || indent < 0)
        PyErr_SetString(PyExc_ValueError, "first, width or indent is negative, expected 0 or more");
    else if (check(&arrays[LINE_WIDTHS], 4 * count, "widths") == 0 && check(&arrays[LINE_IDS], 4 * count, "ids") == 0 &&
             check(&arrays[PAIRS], count, "pairs") == 0 && check(&arrays[TABLE], 256 + 2 * 16, "table") == 0)
        lines = find_lines(arrays, tab, width, indent, keep, annex, space, hard, &state);
    for (int i = 0; i < NUM_ARRAYS; i++)
        PyBuffer_Release(&arrays[i]);
    if (lines < 0)
        return NULL;
    return Py_BuildValue("nnOnnO", lines, state.first, state.opens ? Py_True : Py_False, state.base, state.stop,
                         state.asks ? Py_True : Py_False);
}

static PyMethodDef methods[] = {
    {"look_up", look_up, METH_VARARGS,
     "look_up(text, glyphs, facts, known_widths, ids, widths, classes, annex, simple) -> (number of characters looked "
     "up, whether one runs from right to left)"},
    {"break_lines", break_lines, METH_VARARGS,
     "break_lines(widths, ids, classes, pairs, table, rows, tab, width, indent, keep, annex, space, hard, first, opens) "
     "-> (number of lines, first glyph that is in none, whether it starts a paragraph, base, stop, asks)"},
    {"draw", draw, METH_VARARGS,
     "draw(image, boxes, stops, begins, tops, ids, widths, places, pixels, page_width, height, left, right, background)"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_blit", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__blit(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntMacro(module, INTERFACE) < 0)
        Py_CLEAR(module);
    return module;
}
