//! Links GCC's unwinder into the two thin programs: PostgreSQL starts them once per segment, and finding and
//! mapping one library less saves a tenth of a millisecond of each start.

fn main() {
    println!("cargo::rerun-if-changed=../archive-cmd/build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu") {
        // The whole archive, because what calls it is in the standard library, which the linker comes to later.
        println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=gcc_eh");
    }
}
