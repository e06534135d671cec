//! Numbers and texts as people read them. Pure.

/// Returns text that cannot command a terminal: control characters but line feeds become `?`.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

/// Returns a number of bytes in a unit that people read.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64 / 1024.0;
    if count < 1024 {
        return format!("{count} B");
    }
    for unit in UNITS {
        if value < 1000.0 || unit == "PiB" {
            return if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{count} B")
}

/// Returns a server version as people write it: `17.4`.
pub fn version(number: u32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

/// Returns a time in milliseconds, as long as it needs.
pub fn duration(millis: u64) -> String {
    let seconds = millis / 1000;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0..10) => format!("{:.1} s", millis as f64 / 1000.0),
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// Returns text that is nothing but text in a page of HTML, between tags and in quoted attributes.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' => escaped.push('\n'),
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_versions_and_times_read_well() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (16 << 20, "16 MiB"),
            (1_200_000_000, "1.1 GiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(version(170_004), "17.4");
        for (millis, text) in
            [(1234, "1.2 s"), (59_000, "59 s"), (250_000, "4 min 10 s"), (3_720_000, "1 h 2 min")]
        {
            assert_eq!(duration(millis), text);
        }
    }

    #[test]
    fn text_stays_text() {
        assert_eq!(clean("a\u{1b}[2J\nb"), "a?[2J\nb");
        assert_eq!(escaped("<a href='x'>&\"\u{1b}\n"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;?\n");
    }
}
