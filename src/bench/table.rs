//! Tables in fixed columns, and how numbers are written in them.

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Width, presets};

/// One table: a head, and rows as wide as it.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// What it shows, in a few words; may be empty.
    title: String,
    head: Vec<String>,
    /// Columns that hold words.
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns by name. The first `left` ones hold words and stand to the left, the others hold numbers.
    pub fn new(columns: &[&str], left: usize) -> Self {
        let head = columns.iter().map(|&column| column.to_owned()).collect();
        Self { title: String::new(), head, left, rows: Vec::new() }
    }

    /// The same, under a title.
    pub fn titled(self, title: impl Into<String>) -> Self {
        Self { title: title.into(), ..self }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.head.len(), "a row is as wide as its table");
        self.rows.push(cells);
    }

    pub fn title(&self) -> &str {
        &self.title
    }

    pub fn head(&self) -> &[String] {
        &self.head
    }

    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// Whether a column holds words.
    pub fn is_words(&self, column: usize) -> bool {
        column < self.left
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = comfy_table::Table::new();
        table
            .load_preset(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(&self.head);
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if !self.is_words(index) {
                column.set_cell_alignment(CellAlignment::Right);
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(10)));
            }
        }
        table.add_rows(&self.rows);
        if !self.title.is_empty() {
            writeln!(f, "{}\n", self.title)?;
        }
        table.lines().try_for_each(|line| writeln!(f, "{}", line.trim_end()))
    }
}

/// A size with the largest binary unit that leaves it whole: `64 MiB`, `1536 KiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let (mut value, mut unit) = (bytes, 0);
    while value > 0 && value.is_multiple_of(1024) && unit + 1 < UNITS.len() {
        value /= 1024;
        unit += 1;
    }
    format!("{value} {}", UNITS[unit])
}

/// Reads `64M`, `64MiB`, `64 MB` (all binary), `4096`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write it like 4096, 16K, 64M or 1G");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (bytes, text) in
            [(1, "1 B"), (4096, "4 KiB"), (64 << 20, "64 MiB"), (1536 << 10, "1536 KiB"), (5 << 30, "5 GiB")]
        {
            assert_eq!(size(bytes), text);
            assert_eq!(parse_size(text), Ok(bytes));
        }
        assert_eq!((parse_size("16k"), parse_size("2MB"), parse_size("7")), (Ok(16384), Ok(2 << 20), Ok(7)));
        for wrong in ["", "0", "x", "-1", "1.5M", "99999999999999G", "1Q"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn columns_are_fixed_and_numbers_stand_to_the_right() {
        let mut table = Table::new(&["path", "GB/s"], 1);
        table.row(vec!["shm".to_owned(), "12.3".to_owned()]);
        table.row(vec!["loopback".to_owned(), "1.0".to_owned()]);
        assert_eq!(table.to_string(), "path          GB/s\nshm           12.3\nloopback       1.0\n");
    }
}
