module openpi-flash.local/tools/pause

go 1.26.0
