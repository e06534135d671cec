//! `pitr pages`: man pages and completions, for `walship setup` and packages.

use clap::CommandFactory as _;
use walship::Result;
use walship::pages::{write_completions, write_man_pages};

use super::DONE;
use super::args::{Args, PagesArgs};

pub(super) fn run(args: &PagesArgs) -> Result<u8> {
    if let Some(folder) = &args.man {
        write_man_pages(Args::command(), folder)?;
    }
    if let Some(folder) = &args.completions {
        write_completions(Args::command(), folder)?;
    }
    Ok(DONE)
}
