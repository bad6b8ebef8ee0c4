/*
A training run as one self-contained page: curves drawn as SVG from log.txt, tables, and pictures with their boxes,
embedded. No script, no network, no date: the same run gives the same bytes.

Read in order: text > the log > a chart > the page.

Compiles as C11 and as C++17.
*/
#ifndef DETR_REPORT_H
#define DETR_REPORT_H

#include "json.h"

// ---------------------------------------------------------------------------------------------------------------------
// Text

// Writes text into HTML, as content or as an attribute in double quotes. A byte that is not UTF-8, or a control
// character other than newline and tab, becomes U+FFFD.
static inline void html_print(FILE *file, const char *text) {
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        int length = utf8_length(at);
        if (*at == '&')
            fputs("&amp;", file);
        else if (*at == '<')
            fputs("&lt;", file);
        else if (*at == '>')
            fputs("&gt;", file);
        else if (*at == '"')
            fputs("&quot;", file);
        else if (*at == '\'')
            fputs("&#39;", file);
        else if (length == 0 || (*at < 0x20 && *at != '\n' && *at != '\t') || *at == 0x7F)
            fputs("\xEF\xBF\xBD", file);
        else
            fwrite(at, 1, (size_t)length, file);
        at += length ? length : 1;
    }
}

static inline void base64_print(FILE *file, const unsigned char *bytes, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < size; i += 3) {
        size_t left = size - i;
        unsigned triple = (unsigned)bytes[i] << 16;
        if (left > 1) triple |= (unsigned)bytes[i + 1] << 8;
        if (left > 2) triple |= bytes[i + 2];
        fputc(digits[triple >> 18], file);
        fputc(digits[triple >> 12 & 63], file);
        fputc(left > 1 ? digits[triple >> 6 & 63] : '=', file);
        fputc(left > 2 ? digits[triple & 63] : '=', file);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The log: one JSON object a line, with the keys of DETR's log.txt

enum ReportColumn {
    REPORT_EPOCH,
    REPORT_LR,
    REPORT_PARAMETERS,
    REPORT_LOSS,  // this and what follows to REPORT_AP: training, then test
    REPORT_TEST_LOSS,
    REPORT_CE,
    REPORT_TEST_CE,
    REPORT_BBOX,
    REPORT_TEST_BBOX,
    REPORT_GIOU,
    REPORT_TEST_GIOU,
    REPORT_CLASS_ERROR,
    REPORT_TEST_CLASS_ERROR,
    REPORT_AP,  // twelve COCO numbers
    REPORT_COLUMNS = REPORT_AP + 12
};

static const char *const report_keys[REPORT_AP + 1] = {
    "epoch",          "train_lr",          "n_parameters",     "train_loss",         "test_loss",
    "train_loss_ce",  "test_loss_ce",      "train_loss_bbox",  "test_loss_bbox",     "train_loss_giou",
    "test_loss_giou", "train_class_error", "test_class_error", "test_coco_eval_bbox"};

typedef struct {
    double (*rows)[REPORT_COLUMNS];  // (count), one an epoch; NAN where the line has no such number
    int count;
    int bad_lines;  // that are no JSON objects
} ReportLog;

// Reads a log; log->rows is the caller's to free. 0, or -1 if the file cannot be read.
static inline int report_read_log(ReportLog *log, const char *path, Error *error) {
    char *text;
    size_t size;
    memset(log, 0, sizeof *log);
    if (read_file(path, &text, &size, error) != 0) return -1;
    for (char *line = text, *next; line < text + size; line = next) {
        char *end = (char *)memchr(line, '\n', (size_t)(text + size - line));
        if (!end) end = text + size;
        next = end + 1;
        *end = 0;
        if (strspn(line, " \t\r") == (size_t)(end - line)) continue;
        Error why;
        yajl_val object = json_parse(line, (size_t)(end - line), path, &why);
        if (!YAJL_IS_OBJECT(object)) {
            log->bad_lines++;
            yajl_tree_free(object);
            continue;
        }
        log->rows = (double(*)[REPORT_COLUMNS])grow(log->rows, (size_t)log->count, sizeof *log->rows);
        double *row = log->rows[log->count];
        for (int column = 0; column < REPORT_COLUMNS; column++) {
            yajl_val value = json_member(object, report_keys[column < REPORT_AP ? column : REPORT_AP]);
            size_t element = column < REPORT_AP ? 0 : (size_t)(column - REPORT_AP);
            if (YAJL_IS_ARRAY(value)) value = element < value->u.array.len ? value->u.array.values[element] : NULL;
            row[column] = YAJL_IS_DOUBLE(value) ? value->u.number.d : NAN;
            if (column >= REPORT_AP && row[column] < 0) row[column] = NAN;  // -1: no truth of that size
        }
        if (isnan(row[REPORT_EPOCH])) row[REPORT_EPOCH] = log->count;
        log->count++;
        yajl_tree_free(object);
    }
    free(text);
    return 0;
}

// The row whose `column` is the largest, or -1 if none has a number there.
static inline int report_best(const ReportLog *log, int column) {
    int best = -1;
    for (int i = 0; i < log->count; i++)
        if (isfinite(log->rows[i][column]) && (best < 0 || log->rows[i][column] > log->rows[best][column])) best = i;
    return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// A chart

typedef struct {
    int column;
    const char *label;
    int colour;  // 0 .. 3, a class in the style sheet
    int dashed;  // for what is measured on the test pictures
} ReportSeries;

// The smallest of 1, 2, 5 times a power of ten that cuts `range` into at most `most` steps.
static inline double report_step(double range, int most) {
    double step = pow(10, floor(log10(range / most)));
    static const double factors[4] = {1, 2, 5, 10};
    for (int i = 0; i < 4; i++)
        if (range / (step * factors[i]) <= most * 1.000001) return step * factors[i];
    return step * 10;
}

// Draws the series over the epochs. The vertical axis starts at 0 unless that would flatten the curves. Nothing is
// drawn where no series has a number.
static inline void report_chart(FILE *file, const ReportLog *log, const char *title, const char *note,
                                const ReportSeries *series, int num_series) {
    enum { WIDTH = 560, HEIGHT = 300, LEFT = 56, RIGHT = 16, TOP = 10, BOTTOM = 42 };
    double low = INFINITY, high = -INFINITY, first = INFINITY, last = -INFINITY;
    for (int s = 0; s < num_series; s++) {
        for (int i = 0; i < log->count; i++) {
            double value = log->rows[i][series[s].column], epoch = log->rows[i][REPORT_EPOCH];
            if (!isfinite(value) || !isfinite(epoch)) continue;
            low = fmin(low, value);
            high = fmax(high, value);
            first = fmin(first, epoch);
            last = fmax(last, epoch);
        }
    }
    if (!(low <= high)) return;
    if (low > 0 && low < 0.6 * high) low = 0;
    if (high - low < 1e-9 * fmax(fabs(high), 1)) low = fmin(low, 0), high = fmax(high, low + 0.1);
    double step = report_step(high - low, 6);
    low = floor(low / step + 1e-9) * step;
    high = ceil(high / step - 1e-9) * step;
    double epochs = fmax(last - first, 1), epoch_step = fmax(1, report_step(epochs, 8));
    double x_scale = (WIDTH - LEFT - RIGHT) / epochs, y_scale = (HEIGHT - TOP - BOTTOM) / (high - low);
    double x_shift = last > first ? 0 : (WIDTH - LEFT - RIGHT) / 2.0;  // a single epoch stands in the middle

    fprintf(file, "<figure class=\"chart\"><figcaption><b>%s</b> <span>%s</span></figcaption>\n<p class=\"key\">",
            title, note);
    for (int s = 0; s < num_series; s++)
        if (report_best(log, series[s].column) >= 0)
            fprintf(file, "<span><svg viewBox=\"0 0 26 8\"><path class=\"c%d%s\" d=\"M1 4H25\"/></svg>%s</span>",
                    series[s].colour, series[s].dashed ? " dashed" : "", series[s].label);
    fprintf(file, "</p>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n", WIDTH, HEIGHT, title);
    for (int i = 0; low + i * step <= high + step / 2; i++) {
        double value = low + i * step, y = HEIGHT - BOTTOM - (value - low) * y_scale;
        fprintf(file, "<path class=\"grid\" d=\"M%d %.1fH%d\"/><text x=\"%d\" y=\"%.1f\" class=\"y\">%.6g</text>\n",
                LEFT, y, WIDTH - RIGHT, LEFT - 7, y + 5, fabs(value) < step * 1e-6 ? 0 : value);
    }
    for (int i = 0; i <= 10; i++) {
        double epoch = (ceil(first / epoch_step) + i) * epoch_step, x = LEFT + x_shift + (epoch - first) * x_scale;
        if (epoch > last) break;
        fprintf(file, "<path class=\"grid\" d=\"M%.1f %dv4\"/><text x=\"%.1f\" y=\"%d\" class=\"x\">%.0f</text>\n", x,
                HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 19, epoch);
    }
    fprintf(file, "<text x=\"%d\" y=\"%d\" class=\"x\">epoch</text>\n", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4);
    for (int s = 0; s < num_series; s++) {
        int newest = -1;
        fprintf(file, "<path class=\"c%d%s\" d=\"", series[s].colour, series[s].dashed ? " dashed" : "");
        for (int pass = 0; pass < 2; pass++) {  // the line, then its points
            for (int i = 0; i < log->count; i++) {
                double value = log->rows[i][series[s].column], epoch = log->rows[i][REPORT_EPOCH];
                if (!isfinite(value) || !isfinite(epoch)) continue;  // not measured in that epoch: the line goes on
                double x = LEFT + x_shift + (epoch - first) * x_scale;
                double y = HEIGHT - BOTTOM - (value - low) * y_scale;
                if (pass == 0) {
                    fprintf(file, "%c%.1f %.1f", newest < 0 ? 'M' : 'L', x, y);
                    newest = i;
                } else if (log->count <= 40 || i == newest) {
                    fprintf(file, "<circle class=\"c%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"%s\"><title>%s, epoch %.0f: %.4g",
                            series[s].colour, x, y, i == newest ? "3.5" : "2", series[s].label, epoch, value);
                    fputs("</title></circle>", file);
                }
            }
            if (pass == 0) fputs("\"/>\n", file);
        }
        fputc('\n', file);
    }
    fputs("</svg></figure>\n", file);
}

// ---------------------------------------------------------------------------------------------------------------------
// The page

static const char report_style[] =
    "<style>\n"
    "body{margin:0;background:#f6f7f9;color:#1c2430;font:15px/1.5 system-ui,-apple-system,'Segoe "
    "UI',Roboto,sans-serif}\n"
    "main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}\n"
    "h1{font-size:1.55em;margin:.3em 0 .7em;overflow-wrap:anywhere}\n"
    "h2{font-size:1.1em;margin:2em 0 .7em}\n"
    ".grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px}.pictures{align-"
    "items:start}\n"
    ".cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:10px}\n"
    ".cards div,figure,.box{background:#fff;border:1px solid #e1e5eb;border-radius:8px;margin:0}\n"
    ".cards div{padding:10px 14px}\n"
    ".cards b{display:block;font-size:1.45em;font-variant-numeric:tabular-nums;line-height:1.25}\n"
    ".cards span,figcaption span,.note{color:#5b6676;font-size:.88em}\n"
    ".chart{padding:12px 14px 8px}\n"
    ".key{margin:4px 0 2px;font-size:.88em;display:flex;flex-wrap:wrap;gap:2px 16px}\n"
    ".key svg{width:26px;height:8px;margin-right:6px}\n"
    ".chart>svg{width:100%;height:auto;display:block}\n"
    "svg path{fill:none;stroke-width:2;stroke-linejoin:round}\n"
    "svg path.grid{stroke:#e6e9ee;stroke-width:1}\n"
    "svg text{font-size:12.5px;fill:#5b6676}.x{text-anchor:middle}.y{text-anchor:end}\n"
    "path.c0{stroke:#1f6feb}path.c1{stroke:#d4690b}path.c2{stroke:#15803d}path.c3{stroke:#8b3fc7}\n"
    "circle.c0{fill:#1f6feb}circle.c1{fill:#d4690b}circle.c2{fill:#15803d}circle.c3{fill:#8b3fc7}\n"
    "@media(max-width:520px){svg text{font-size:18px}}\n"
    "path.dashed{stroke-dasharray:6 4}\n"
    ".box{overflow:auto}.box.long{max-height:26em}\n"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\n"
    "th,td{padding:5px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid #eef0f4}\n"
    "th{position:sticky;top:0;background:#fff;font-weight:600;box-shadow:0 1px #d5dae2}\n"
    "th.l,td.l{text-align:left}tr.best td{background:#eaf6ee}\n"
    "pre.box{padding:12px 14px;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}\n"
    ".pictures figure{padding:8px}.pictures figcaption{padding:6px 4px 0;overflow-wrap:anywhere;font-size:.88em}\n"
    ".pictures img{display:block;width:100%;max-height:640px;object-fit:contain;background:#eef0f4;border-radius:4px}\n"
    "</style>\n";

// One figure large, what it is below; nothing where there is no figure. `format` takes one double.
static inline void report_card(FILE *file, const char *format, double value, const char *label) {
    if (!isfinite(value)) return;
    fputs("<div><b>", file);
    fprintf(file, format, value);
    fprintf(file, "</b><span>%s</span></div>\n", label);
}

// A table cell; a dash where there is no number.
static inline void report_cell(FILE *file, const char *format, double value) {
    fputs("<td>", file);
    if (isfinite(value))
        fprintf(file, format, value);
    else
        fputs("&ndash;", file);
    fputs("</td>", file);
}

// The twelve COCO numbers of the last and of the best evaluation, then a row an epoch. best: row, or -1 without any.
static inline void report_tables(FILE *file, const ReportLog *log, int best) {
    static const char *const names[12] = {"AP",          "AP50",      "AP75",       "AP, small",
                                          "AP, medium",  "AP, large", "AR, top 1",  "AR, top 10",
                                          "AR, top 100", "AR, small", "AR, medium", "AR, large"};
    if (best >= 0) {
        int latest = log->count - 1;
        while (!isfinite(log->rows[latest][REPORT_AP])) latest--;
        fprintf(file,
                "<h2>COCO evaluation</h2>\n<div class=\"box\"><table><tr><th class=\"l\">measure</th><th>last: epoch "
                "%.0f</th><th>best AP: epoch %.0f</th></tr>\n",
                log->rows[latest][REPORT_EPOCH], log->rows[best][REPORT_EPOCH]);
        for (int i = 0; i < 12; i++) {
            fprintf(file, "<tr><td class=\"l\">%s</td>", names[i]);
            report_cell(file, "%.3f", log->rows[latest][REPORT_AP + i]);
            report_cell(file, "%.3f", log->rows[best][REPORT_AP + i]);
            fputs("</tr>\n", file);
        }
        fputs(
            "</table></div>\n<p class=\"note\">AP is average precision over IoU 0.50 to 0.95, AP50 and AP75 at "
            "one IoU; AR is average recall, top n with the n best boxes of each picture and class. Small is an area up "
            "to "
            "32&sup2; pixels, large from 96&sup2;. A dash: no truth of that size.</p>\n",
            file);
    }
    fputs(
        "<h2>Epochs</h2>\n<div class=\"box long\"><table><tr><th>epoch</th><th>learning rate</th><th>loss</th><th>test "
        "loss</th>"
        "<th>class error %</th><th>test class error %</th><th>AP</th><th>AP50</th></tr>\n",
        file);
    for (int i = log->count - 1; i >= 0; i--) {
        const double *row = log->rows[i];
        fputs(i == best ? "<tr class=\"best\">" : "<tr>", file);
        report_cell(file, "%.0f", row[REPORT_EPOCH]);
        report_cell(file, "%.3g", row[REPORT_LR]);
        report_cell(file, "%.4f", row[REPORT_LOSS]);
        report_cell(file, "%.4f", row[REPORT_TEST_LOSS]);
        report_cell(file, "%.2f", row[REPORT_CLASS_ERROR]);
        report_cell(file, "%.2f", row[REPORT_TEST_CLASS_ERROR]);
        report_cell(file, "%.3f", row[REPORT_AP]);
        report_cell(file, "%.3f", row[REPORT_AP + 1]);
        fputs("</tr>\n", file);
    }
    fputs("</table></div>\n", file);
    if (best >= 0) fputs("<p class=\"note\">Newest first; the epoch with the best AP is green.</p>\n", file);
}

// A picture that cannot be shown leaves a note in its place.
static inline void report_picture(FILE *file, const char *path) {
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    char *bytes = NULL;
    size_t size = 0;
    Error error;
    fputs("<figure>", file);
    if (read_file(path, &bytes, &size, &error) != 0) {
        fputs("<p class=\"note\">", file);
        html_print(file, error.text);
        fputs("</p>", file);
    } else {
        fprintf(file, "<img loading=\"lazy\" src=\"data:image/%s;base64,",
                memcmp(bytes, "\x89PNG", size < 4 ? size : 4) ? "jpeg" : "png");
        base64_print(file, (const unsigned char *)bytes, size);
        fputs("\" alt=\"", file);
        html_print(file, name);
        fputs("\"><figcaption>", file);
        html_print(file, name);
        fputs("</figcaption>", file);
    }
    fputs("</figure>\n", file);
    free(bytes);
}

// Writes the page. title: plain text; log_path: DETR's log.txt, or NULL; picture_paths: (num_pictures) JPEG or PNG
// files, embedded as they are; facts: plain text shown as it is (data set, model, scores by class), or NULL. The file
// is written beside its place and renamed, so that a page is always whole. 0, or -1 (the log cannot be read, the page
// cannot be written).
static inline int report_write(const char *path, const char *title, const char *log_path,
                               const char *const *picture_paths, int num_pictures, const char *facts, Error *error) {
    ReportLog log;
    memset(&log, 0, sizeof log);
    if (log_path && report_read_log(&log, log_path, error) != 0) return -1;
    char *temporary = format_string("%s.tmp", path);
    FILE *file = fopen(temporary, "w");
    if (!file) {
        fail(error, "%s: cannot be written: %s", temporary, strerror(errno));
        free(temporary);
        free(log.rows);
        return -1;
    }
    fputs(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n"
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>",
        file);
    html_print(file, title);
    fprintf(file, "</title>\n%s<main>\n<h1>", report_style);
    html_print(file, title);
    fputs("</h1>\n", file);

    int best = report_best(&log, REPORT_AP);
    if (log.count > 0) {
        const double *last = log.rows[log.count - 1];
        fputs("<div class=\"cards\">\n", file);
        report_card(file, "%.0f", log.count, log.count == 1 ? "epoch finished" : "epochs finished");
        if (best >= 0) {
            char label[64];
            snprintf(label, sizeof label, "best AP (epoch %.0f)", log.rows[best][REPORT_EPOCH]);
            report_card(file, "%.3f", log.rows[best][REPORT_AP], label);
            report_card(file, "%.3f", log.rows[best][REPORT_AP + 1], "AP50 in that epoch");
        }
        report_card(file, "%.3f", last[REPORT_LOSS], "training loss, last epoch");
        report_card(file, "%.3f", last[REPORT_TEST_LOSS], "test loss, last epoch");
        report_card(file, "%.2f M", last[REPORT_PARAMETERS] / 1e6, "trained parameters");
        fputs("</div>\n<h2>Curves</h2>\n<div class=\"grid2\">\n", file);
        static const ReportSeries losses[] = {{REPORT_LOSS, "training", 0, 0}, {REPORT_TEST_LOSS, "test", 1, 1}};
        static const ReportSeries scores[] = {
            {REPORT_AP, "AP", 0, 0}, {REPORT_AP + 1, "AP50", 1, 0}, {REPORT_AP + 2, "AP75", 2, 0}};
        static const ReportSeries parts[] = {
            {REPORT_CE, "class", 0, 0},      {REPORT_TEST_CE, "class, test", 0, 1},
            {REPORT_BBOX, "box L1", 1, 0},   {REPORT_TEST_BBOX, "box L1, test", 1, 1},
            {REPORT_GIOU, "box GIoU", 2, 0}, {REPORT_TEST_GIOU, "box GIoU, test", 2, 1}};
        static const ReportSeries errors[] = {{REPORT_CLASS_ERROR, "training", 0, 0},
                                              {REPORT_TEST_CLASS_ERROR, "test", 1, 1}};
        report_chart(file, &log, "Loss", "all parts and all decoder layers, weighted", losses, 2);
        report_chart(file, &log, "Average precision", "on the test pictures; higher is better", scores, 3);
        report_chart(file, &log, "Parts of the loss", "last decoder layer, weighted", parts, 6);
        report_chart(file, &log, "Class error", "% of matched boxes with the wrong class", errors, 2);
        fputs("</div>\n", file);
    } else {
        fputs("<p>No epoch is finished yet.</p>\n", file);
    }
    if (log.bad_lines)
        fprintf(file, "<p class=\"note\">Lines of the log that are not JSON, left out: %d.</p>\n", log.bad_lines);
    if (num_pictures > 0) {
        fputs("<h2>Pictures</h2>\n<div class=\"grid2 pictures\">\n", file);
        for (int i = 0; i < num_pictures; i++) report_picture(file, picture_paths[i]);
        fputs("</div>\n", file);
    }
    if (log.count > 0) report_tables(file, &log, best);
    if (facts && *facts) {
        fputs("<h2>Facts</h2>\n<pre class=\"box\">", file);
        html_print(file, facts);
        fputs("</pre>\n", file);
    }
    fputs("</main>\n</html>\n", file);
    free(log.rows);
    int bad = ferror(file);
    if (fclose(file) != 0 || bad || rename(temporary, path) != 0)
        bad = fail(error, "%s: cannot be written: %s", path, strerror(errno));
    if (bad) remove(temporary);
    free(temporary);
    return bad ? -1 : 0;
}

#endif
